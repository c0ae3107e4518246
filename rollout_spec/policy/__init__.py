"""When to speculate and how far: pure functions of measurements, without torch."""
