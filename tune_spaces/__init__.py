"""Search spaces for `jobs/sweep.py`: each function returns plain data that Ray Tune understands.

A space maps names of `mtlsign.config.embed.EmbedSettings` (`phase1.epochs`) to a fixed value or to
``{"grid_search": [...]}``, as ``ray.tune.grid_search`` returns it. Spaces are read, printed and tested
without Ray.
"""

from __future__ import annotations

from tune_spaces.defaults import defaults
from tune_spaces.paper_grid import paper_ablation, paper_grid
from tune_spaces.smoke import smoke

__all__ = ["defaults", "paper_ablation", "paper_grid", "smoke"]
