"""The functions users call; each module one family. Devices are reached through the operators only."""

__all__: list[str] = []
