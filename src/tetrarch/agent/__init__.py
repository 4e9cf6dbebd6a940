"""The host's end of the agent in guests: commands there, with their input and output here."""

from tetrarch.agent.client import AgentError, AgentStream, connect, encode_run

__all__ = ["AgentError", "AgentStream", "connect", "encode_run"]
