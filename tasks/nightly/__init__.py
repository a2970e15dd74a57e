"""What a night needs apart from Prefect: its worktree, its record, newer sources, and the figures that are judged.

The flow that runs it is flows/night.py, the judgement's mathematics `tasks.algorithms.statistics.gate`.
"""
