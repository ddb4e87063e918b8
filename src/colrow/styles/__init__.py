"""Styles: one file a style or close family. Importing the package imports every module in it, and each registers the
styles that it defines (`base.STYLES`): a new style is a new file, and no list names it.
"""

import importlib
import pkgutil

for _module in pkgutil.walk_packages(__path__, f"{__name__}."):
    importlib.import_module(_module.name)
