"""The int8 primitives of SwitchBack training (Wortsman et al., 2023), one to a module.

They carry the names under which Triton kernels are known, and are written as plain torch over the package's int8
matmul operator: the same results on every device, with or without Triton. A device that has something faster provides
it below the operator, where these functions find it.
"""

__all__: list[str] = []
