"""The report page: one HTML file that opens without a network, made from the JSON that runs save.

`run/` and `ranking/` read what was saved, make plain Vega-Lite specifications, and write the words; `document` puts
words, figures and libraries into one file; `saved` finds out what a path holds.
"""
