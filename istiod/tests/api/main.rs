//! The admin API as its callers meet it: over sockets, with every role and without one.

mod certificate;
mod document;
mod fuzz;
mod garbage;
mod grpc;
mod history;
mod limits;
mod member;
mod objects;
mod roles;
mod schema;
