"""Error analysis: saved predictions in, one page of figures and cases out (`tools/analyze.py`).

`cases` reads what the evaluators wrote, `scenes` looks the truth up in the dataset, `groups`
counts, `figures` and `gallery` draw, and `page` puts all of it into one HTML file.
"""
