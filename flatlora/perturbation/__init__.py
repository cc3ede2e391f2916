"""The one mechanism that perturbs adapted layers while they are trained. It knows no method by name.

A forward: `PerturbedForward` (`attachment.py`) asks whether the pass is perturbed (`passes.py`), asks the `Source` for
ε (`source.py`; a method overrides `draw`), and adds ``x·εᵀ`` (`products.py`, by `Added` of `kernels/low_rank.py`).
Backward records ``⟨G, ε⟩`` in `LossRise` (`rise.py`). In a step `PerturbingOptimizer` (`optimizer.py`) has the source
read the gradients and go on to the next ε; `Watch` (`bypass.py`) notices what goes past it.
"""
