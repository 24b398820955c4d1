"""Runs that outlive SLURM jobs: what a job script needs to start, stop and resume training.

Standard library only, except where training itself begins: the pieces run on login nodes and in
containers, before anything heavy is imported.
"""
