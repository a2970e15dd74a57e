"""Tests of whether a difference is one: bootstrap intervals, the gate's limits, the canary's sequential test."""
