"""What people see: tables, timelines, SVG figures, trace files. Only the command line imports it."""
