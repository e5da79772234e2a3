//! A Consul catalog as a source: every failure against a fake, whose conversations a real Consul has too.

mod conformance;
mod fake;
mod matrix;
mod real;
mod scale;
mod world;
