"""Jobs for the engine that a cluster has: what is to run, as the files and commands that start it and start it again.

The engine (Slurm, Kubernetes, queued resources, SkyPilot) places, starts and restarts. Each slice runs the same
``peer-jax`` command on the same workdir; runs of a sweep are claimed there, so slices never train the same one.
"""
