//! A real stream over loopback.
