"""BiDoRA: magnitude and direction on two levels."""
