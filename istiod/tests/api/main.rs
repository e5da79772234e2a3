//! The admin API as its callers meet it: over sockets, with every role and without one.

mod history;
mod limits;
mod member;
mod roles;
