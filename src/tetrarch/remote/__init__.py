"""Machines that other processes run."""

from tetrarch.remote.machine import Completed, RemoteMachine, connect

__all__ = ["Completed", "RemoteMachine", "connect"]
