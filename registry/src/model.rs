//! What a mesh is made of.

pub mod service;
