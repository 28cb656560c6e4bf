"""A page about runs: what their folders hold, as one HTML file with figures.

``record.py`` and ``layers.py`` read folders, finished or not. ``story.py`` and ``findings.py`` put into words what they
hold, ``tables.py`` into tables, ``plots.py``, ``layer_plots.py`` and ``cost_plots.py`` into drawings, which ``svg.py``
makes part of a page. ``render.py`` puts all of it into ``page.html.j2``.
"""
