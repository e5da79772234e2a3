//! Configuration texts to objects of the model.
//!
//! [`yaml`] reads a text into a tree of [`node`]s that know their place; [`decode`] turns a tree into the typed
//! messages of [`crate::model`]; [`object`] is what a tree with `kind` and `metadata` becomes.

pub mod decode;
pub mod node;
pub mod object;
pub mod yaml;

pub use node::{Location, Path};
pub use object::{Kind, NotAnObject, Object, Spec};
