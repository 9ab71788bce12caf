"""FLOPs and bytes, as functions of the spec: one arithmetic for dry runs, the planner and the MFU meter."""
