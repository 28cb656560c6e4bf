"""Print pip constraints that hold the requirements of setup.cfg at the lowest release that each admits.

Left out are torch and the extras beside those that the core of the tests needs.
"""

import configparser
import re
from pathlib import Path

EXTRAS = ("train", "deepspeed", "mpi4py")

config = configparser.ConfigParser()
config.read(Path(__file__).resolve().parents[1] / "setup.cfg")
extras = config["options.extras_require"]
for requirement in "\n".join([config["options"]["install_requires"], *(extras[name] for name in EXTRAS)]).split():
    name, bound = re.fullmatch(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)(?:,<[\d.]+)?", requirement).groups()
    if name != "torch":
        print(f"{name}=={bound}")  # 4.70 is 4.70.0
