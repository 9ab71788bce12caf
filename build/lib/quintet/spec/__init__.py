"""Who is who: the frozen description of a run, with no torch behind it."""
