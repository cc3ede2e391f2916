"""The one mechanism that perturbs adapted layers while they are trained. It knows no method by name."""
