//! Requests from bytes, and responses to bytes without a copy of any resource.

use envoy_types::pb::envoy::config::core::v3::Node;
use envoy_types::pb::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DiscoveryRequest};
use prost::Message;
use prost::bytes::BufMut;
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint, key_len};
use tonic::Status;
use tonic::codec::{DecodeBuf, Decoder, EncodeBuf, Encoder};

use crate::resources::Resource;
use crate::stream::{Response, Variant, version_text};

/// A request of either form.
#[derive(Debug, Clone, PartialEq)]
pub enum Incoming {
    /// Delta.
    Delta(DeltaDiscoveryRequest),
    /// State of the world.
    Whole(DiscoveryRequest),
}

impl Incoming {
    pub(super) fn node(&self) -> Option<&Node> {
        match self {
            Self::Delta(request) => request.node.as_ref(),
            Self::Whole(request) => request.node.as_ref(),
        }
    }

    /// The revision of what a client has, where its first request tells: the state-of-the-world form does.
    pub(super) fn told_revision(&self) -> Option<u64> {
        match self {
            Self::Delta(_) => None,
            Self::Whole(request) => request.version_info.parse().ok(),
        }
    }
}

/// Reads and writes the messages of one form.
#[derive(Debug, Clone, Copy)]
pub(super) struct Codec {
    pub(super) variant: Variant,
}

impl tonic::codec::Codec for Codec {
    type Encode = Response;
    type Decode = Incoming;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        *self
    }

    fn decoder(&mut self) -> Self {
        *self
    }
}

impl Decoder for Codec {
    type Item = Incoming;
    type Error = Status;

    fn decode(&mut self, buf: &mut DecodeBuf<'_>) -> Result<Option<Incoming>, Status> {
        let request = match self.variant {
            Variant::Delta => DeltaDiscoveryRequest::decode(buf).map(Incoming::Delta),
            Variant::StateOfTheWorld => DiscoveryRequest::decode(buf).map(Incoming::Whole),
        };
        request.map(Some).map_err(|error| Status::invalid_argument(error.to_string()))
    }
}

impl Encoder for Codec {
    type Item = Response;
    type Error = Status;

    fn encode(&mut self, response: Response, buf: &mut EncodeBuf<'_>) -> Result<(), Status> {
        write(self.variant, &response, buf);
        Ok(())
    }
}

/// Writes a `DeltaDiscoveryResponse` or a `DiscoveryResponse`. Both number their common fields alike.
fn write(variant: Variant, response: &Response, buf: &mut impl BufMut) {
    string(1, &response.version, buf);
    for resource in &response.resources {
        match variant {
            Variant::Delta => delta_resource(resource, buf),
            Variant::StateOfTheWorld => message(2, &resource.body, buf),
        }
    }
    string(4, &response.type_url, buf);
    string(5, &response.nonce, buf);
    if variant == Variant::Delta {
        response.removed.iter().for_each(|name| string(6, name, buf));
    }
}

/// Field 2 of a delta response: `Resource { version = 1, resource = 2, name = 3 }`.
fn delta_resource(resource: &Resource, buf: &mut impl BufMut) {
    let version = version_text(resource.version);
    let body = resource.body.encoded_len();
    let len = field_len(1, version.len()) + field_len(2, body) + field_len(3, resource.name.len());
    length_delimited(2, len, buf);
    string(1, &version, buf);
    message(2, &resource.body, buf);
    string(3, &resource.name, buf);
}

/// Bytes of a resource in a response of this form.
#[must_use]
pub fn resource_len(variant: Variant, resource: &Resource) -> usize {
    let body = resource.body.encoded_len();
    match variant {
        Variant::Delta => {
            let version = version_text(resource.version);
            field_len(2, field_len(1, version.len()) + field_len(2, body) + field_len(3, resource.name.len()))
        }
        Variant::StateOfTheWorld => field_len(2, body),
    }
}

fn string(tag: u32, text: &str, buf: &mut impl BufMut) {
    length_delimited(tag, text.len(), buf);
    buf.put_slice(text.as_bytes());
}

fn message(tag: u32, message: &impl Message, buf: &mut impl BufMut) {
    length_delimited(tag, message.encoded_len(), buf);
    message.encode_raw(buf);
}

fn length_delimited(tag: u32, len: usize, buf: &mut impl BufMut) {
    encode_key(tag, WireType::LengthDelimited, buf);
    encode_varint(len as u64, buf);
}

fn field_len(tag: u32, len: usize) -> usize {
    key_len(tag) + encoded_len_varint(len as u64) + len
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use envoy_types::pb::envoy::service::discovery::v3::{DeltaDiscoveryResponse, DiscoveryResponse};
    use envoy_types::pb::google::protobuf::Any;

    use super::*;

    fn response() -> Response {
        let body = |n: usize| Any { type_url: "type.googleapis.com/x.Y".to_owned(), value: vec![7; n] };
        let resource =
            |name: &str, n| Arc::new(Resource { name: name.to_owned(), version: 0xfeed, body: body(n) });
        Response {
            type_url: "type.googleapis.com/x.Y".to_owned(),
            nonce: "12-3".to_owned(),
            revision: 12,
            version: "12".to_owned(),
            resources: vec![resource("a", 0), resource("b", 300), resource("c", 100_000)],
            removed: vec!["d".to_owned(), "e".to_owned()],
        }
    }

    #[test]
    fn a_delta_response_is_what_the_generated_code_reads() {
        let mut bytes = Vec::new();
        write(Variant::Delta, &response(), &mut bytes);
        let read = DeltaDiscoveryResponse::decode(bytes.as_slice()).unwrap();
        let names: Vec<_> = read.resources.iter().map(|r| (r.name.as_str(), r.version.as_str())).collect();
        let version = "000000000000feed";
        assert_eq!(names, [("a", version), ("b", version), ("c", version)]);
        assert_eq!(read.resources[2].resource, Some(response().resources[2].body.clone()));
        assert_eq!(read.removed_resources, ["d", "e"]);
        assert_eq!((read.nonce.as_str(), read.system_version_info.as_str()), ("12-3", "12"));
        assert_eq!(read.type_url, "type.googleapis.com/x.Y");
        assert_eq!(read.encoded_len(), bytes.len());
    }

    #[test]
    fn a_state_of_the_world_response_is_what_the_generated_code_reads() {
        let mut bytes = Vec::new();
        write(Variant::StateOfTheWorld, &response(), &mut bytes);
        let read = DiscoveryResponse::decode(bytes.as_slice()).unwrap();
        let bodies: Vec<_> = response().resources.iter().map(|r| r.body.clone()).collect();
        assert_eq!(read.resources, bodies);
        assert_eq!((read.nonce.as_str(), read.version_info.as_str()), ("12-3", "12"));
        assert_eq!(read.encoded_len(), bytes.len());
    }
}
