//! The table of all routes. The router, the check of who may call, the gRPC services and the OpenAPI document are made
//! from it, so a route that is not here does not exist, and none is without a permission.
//!
//! A new call is one row in the table of its area below [`super::rest`], beside its handler.

use std::time::Duration;

use axum::routing::MethodRouter;
use schemars::{JsonSchema, Schema, SchemaGenerator};

use super::{Api, grpc, rest};
use crate::access::Permission;

/// The areas of the API, each with its own table.
pub const AREAS: &[&[Route]] = &[
    rest::plain::ROUTES,
    rest::objects::ROUTES,
    rest::mesh::ROUTES,
    rest::trust::ROUTES,
    rest::nodes::ROUTES,
    rest::access::ROUTES,
    rest::history::ROUTES,
    rest::audit::ROUTES,
    rest::backup::ROUTES,
    grpc::ROUTES,
    rest::members::ROUTES,
];

/// Every route.
pub fn all() -> impl Iterator<Item = &'static Route> {
    AREAS.iter().copied().flatten()
}

/// Whose namespaces a call is about, for callers whose rights are limited to some.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Nobody's: the caller itself, or what everybody may know.
    Nobody,
    /// The namespace that the path names (`{namespace}`).
    Path,
    /// Several: the service layer shows and takes only what is in the caller's.
    Each,
    /// The whole mesh: a caller that is limited is refused.
    Mesh,
}

/// What a route is called with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verb {
    /// `GET`
    Get,
    /// `POST`
    Post,
    /// `PUT`
    Put,
    /// `DELETE`
    Delete,
}

impl Verb {
    /// The HTTP method.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Post => "POST",
            Self::Put => "PUT",
            Self::Delete => "DELETE",
        }
    }

    /// Whether it changes nothing (RFC 9110, section 9.2.1).
    #[must_use]
    pub fn is_safe(self) -> bool {
        self == Self::Get
    }
}

/// Makes the schema of a type in a document.
pub type SchemaOf = fn(&mut SchemaGenerator) -> Schema;

/// The schema of `T`.
pub fn schema<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    generator.subschema_for::<T>()
}

/// What a body is.
#[derive(Debug, Clone, Copy)]
pub enum Form {
    /// Nothing.
    Nothing,
    /// `application/json`
    Json(SchemaOf),
    /// One JSON value on each line, as they come: `application/jsonl`.
    Lines(SchemaOf),
    /// Text of this media type.
    Text(&'static str),
    /// Bytes.
    Bytes,
    /// A gRPC service of its own; not part of the OpenAPI document.
    Grpc,
}

/// One route.
#[derive(Debug, Clone, Copy)]
pub struct Route {
    /// How it is called.
    pub verb: Verb,
    /// Its path, with parameters in braces.
    pub path: &'static str,
    /// Name of the operation, unique: `listServices`.
    pub id: &'static str,
    /// What it does, in one sentence.
    pub does: &'static str,
    /// What the caller needs.
    pub needs: Permission,
    /// And where.
    pub scope: Scope,
    /// `Service/Method` below `istiod.admin.v1` that is the same call in gRPC.
    pub rpc: Option<&'static str>,
    /// What may follow the question mark: an object.
    pub query: Option<SchemaOf>,
    /// The body of the request.
    pub body: Form,
    /// The most bytes of that body.
    pub largest: usize,
    /// Status and body of a good answer.
    pub status: u16,
    /// See `status`.
    pub answer: Form,
    /// An answer that has not begun by then is given up.
    pub within: Duration,
    /// What answers.
    pub handler: fn() -> MethodRouter<Api>,
}

/// Largest body unless a route says otherwise, in bytes.
const LARGEST: usize = 1024 * 1024;

/// An answer begins within this time unless a route says otherwise.
const WITHIN: Duration = Duration::from_secs(30);

impl Route {
    const fn new(
        verb: Verb,
        path: &'static str,
        needs: Permission,
        scope: Scope,
        handler: fn() -> MethodRouter<Api>,
    ) -> Self {
        Self {
            verb,
            path,
            id: "",
            does: "",
            needs,
            scope,
            rpc: None,
            query: None,
            body: Form::Nothing,
            largest: LARGEST,
            status: 200,
            answer: Form::Nothing,
            within: WITHIN,
            handler,
        }
    }

    /// A route that reads.
    #[must_use]
    pub const fn get(
        path: &'static str,
        needs: Permission,
        scope: Scope,
        handler: fn() -> MethodRouter<Api>,
    ) -> Self {
        Self::new(Verb::Get, path, needs, scope, handler)
    }

    /// A route that does or makes something.
    #[must_use]
    pub const fn post(
        path: &'static str,
        needs: Permission,
        scope: Scope,
        handler: fn() -> MethodRouter<Api>,
    ) -> Self {
        Self::new(Verb::Post, path, needs, scope, handler)
    }

    /// A route that replaces something.
    #[must_use]
    pub const fn put(
        path: &'static str,
        needs: Permission,
        scope: Scope,
        handler: fn() -> MethodRouter<Api>,
    ) -> Self {
        Self::new(Verb::Put, path, needs, scope, handler)
    }

    /// A route that removes something.
    #[must_use]
    pub const fn delete(
        path: &'static str,
        needs: Permission,
        scope: Scope,
        handler: fn() -> MethodRouter<Api>,
    ) -> Self {
        Self::new(Verb::Delete, path, needs, scope, handler)
    }

    /// Names the operation and says what it does.
    #[must_use]
    pub const fn named(mut self, id: &'static str, does: &'static str) -> Self {
        (self.id, self.does) = (id, does);
        self
    }

    /// The same call in gRPC, `Service/Method`.
    #[must_use]
    pub const fn rpc(mut self, rpc: &'static str) -> Self {
        self.rpc = Some(rpc);
        self
    }

    /// What may follow the question mark.
    #[must_use]
    pub const fn query(mut self, schema: SchemaOf) -> Self {
        self.query = Some(schema);
        self
    }

    /// The body of the request, and the most bytes of it.
    #[must_use]
    pub const fn takes(mut self, form: Form, largest: usize) -> Self {
        (self.body, self.largest) = (form, largest);
        self
    }

    /// A JSON body of the usual size.
    #[must_use]
    pub const fn takes_json(self, schema: SchemaOf) -> Self {
        self.takes(Form::Json(schema), LARGEST)
    }

    /// Status and body of a good answer.
    #[must_use]
    pub const fn answers(mut self, status: u16, form: Form) -> Self {
        (self.status, self.answer) = (status, form);
        self
    }

    /// A good answer is 200 with this JSON.
    #[must_use]
    pub const fn json(self, schema: SchemaOf) -> Self {
        self.answers(200, Form::Json(schema))
    }

    /// The time in which an answer begins.
    #[must_use]
    pub const fn within(mut self, time: Duration) -> Self {
        self.within = time;
        self
    }
}
