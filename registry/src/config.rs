//! Configuration texts to objects of the model.
//!
//! [`yaml`] reads a text into a tree of [`node`]s that know their place; [`decode`] turns a tree into the typed
//! messages of [`crate::model`].

pub mod decode;
pub mod node;
