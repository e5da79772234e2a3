//! The harness: programs, peers, and waiting.
