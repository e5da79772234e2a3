//! Warming, sharing and swapping.
