"""An adapter loads neither the library that it fits nor anything of the training side."""

from __future__ import annotations

import subprocess
import sys


def test_adapters_import_no_peer():
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import hardmix.integrations.timm, hardmix.integrations.torchvision\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "assert not new & {'timm', 'torchvision', 'kornia', 'PIL', 'accelerate', 'matplotlib', 'pydantic'}, new\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
