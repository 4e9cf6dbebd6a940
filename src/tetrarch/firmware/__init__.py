"""Firmware for guests: SeaBIOS, OVMF and others, and what they ask about their machine."""

__all__: list[str] = []
