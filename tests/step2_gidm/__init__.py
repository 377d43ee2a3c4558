"""Tests of the inverse model."""
