"""From statistics to a shallower model: score, fit, choose, plan, apply."""
