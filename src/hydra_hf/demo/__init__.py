"""A page in the browser for one model: draw, ask, edit, rebuild, paint depth and boundaries, clips. Needs the extra `demo`."""
