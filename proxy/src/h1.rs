//! HTTP/1 (RFC 9112) as bytes: heads and bodies of requests and responses are read and written here, for both ends of
//! the proxy, by functions without IO. [`wire`] moves the bytes; who asks for what and when is decided by
//! [`crate::http::h1`] towards clients and by [`crate::upstream::h1`] towards endpoints.

pub mod body;
pub mod head;
pub mod request;
pub mod response;
pub mod wire;
