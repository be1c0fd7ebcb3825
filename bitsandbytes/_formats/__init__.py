"""What the numbers mean: codebooks, formats, quantization states, packing. No device code."""

__all__: list[str] = []
