"""The flows: dvc.yaml as Prefect runs, every night too, and the commands of `edgepress` that need them.

Prefect is imported here and nowhere else; a command that can do without (`night list`, a stage without a server)
imports it only where it is needed.
"""
