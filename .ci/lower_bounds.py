"""Print pip constraints that hold every requirement of setup.cfg, torch excepted, at the lowest release it admits."""

import configparser
import re
from pathlib import Path

config = configparser.ConfigParser()
config.read(Path(__file__).resolve().parents[1] / "setup.cfg")
for requirement in config["options"]["install_requires"].split():
    name, bound = re.fullmatch(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)(?:,<[\d.]+)?", requirement).groups()
    if name != "torch":
        print(f"{name}=={bound}")  # 4.70 is 4.70.0
