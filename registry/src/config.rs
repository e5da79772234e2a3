//! Configuration texts to objects of the model.
//!
//! [`yaml`] reads a text into a tree of [`node`]s that know their place; [`decode`] turns a tree into the typed
//! messages of [`crate::model`]; [`object`] is what a tree with `kind` and `metadata` becomes; [`validate`] has
//! the rules that types cannot say; [`parse()`] does all of it, and tells every mistake of a text at once.

pub mod decode;
pub mod node;
pub mod object;
pub mod parse;
pub mod validate;
mod written;
pub mod yaml;

pub use node::{Location, Path};
pub use object::{Kind, NotAnObject, Object, Spec, Typed};
pub use parse::{ConfigError, Warning, parse, parse_in, parse_mesh, parse_value};
pub use validate::{Problem, Related, Severity, validate_set};
pub use written::Written;
