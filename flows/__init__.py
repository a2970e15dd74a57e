"""Everything that imports Prefect, and nothing else."""
