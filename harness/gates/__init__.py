"""Gates: a verdict on two sides by their stored records.

Nothing here imports torch, pandas or seaborn: a gate answers within a second on any machine.
"""
