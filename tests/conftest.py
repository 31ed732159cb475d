"""Settings of all tests."""

from hypothesis import settings

settings.register_profile("bimode", deadline=None)  # machines are shared, and first calls compile
settings.load_profile("bimode")
