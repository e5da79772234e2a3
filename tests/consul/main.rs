//! A Consul catalog as a source: every failure, against a fake whose conversations a real Consul has too.

mod fake;
mod matrix;
mod world;
