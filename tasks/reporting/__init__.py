"""The report's page: what it gathers, its figures, verdict, charts, tables and sections.

Only stage report uses this room, and depends on it as a whole. It measures and judges nothing that a stage didn't.
"""
