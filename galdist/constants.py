"""Numbers of nature, in the units of this package: Mpc/h, km/s, Msun/h."""

HUBBLE = 100.0  # km/s/(Mpc/h)
CRITICAL_DENSITY = 2.77536627e11  # (Msun/h) / (Mpc/h)^3 at z=0
GRAVITY = 4.30091727e-9  # Mpc (km/s)^2 / Msun; the same number with Mpc/h and Msun/h
