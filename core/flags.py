"""How flags that many verbs have are written: free of torch."""

from pathlib import Path
from typing import Annotated

from tyro.conf import arg

Output = Annotated[Path, arg(aliases=["-o"])]
OptionalOutput = Annotated[Path | None, arg(aliases=["-o"])]
