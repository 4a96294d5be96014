"Reads all metadata from settings.ini, so that it stands in one place."
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
extras = {name: cfg[f"{name}_requirements"].split() for name in ("eval", "repa", "text", "demo", "docs")}

setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], keywords=cfg["keywords"],
    author=cfg["author"], license="Apache-2.0", license_files=["LICENSE"], url=cfg["git_url"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    packages=["deco"],
    package_data={"deco": ["py.typed", "weights/*/*", "weights/*/evaluation/*"]},
    zip_safe=False,
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require=extras | {"dev": sum(extras.values(), cfg["dev_requirements"].split())},
    entry_points={"nbdev": [f"{cfg['lib_path']} = {cfg['lib_path']}._modidx:d"]},
)
