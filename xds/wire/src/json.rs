//! Messages in protobuf's JSON form, every nested `Any` expanded.

use base64::prelude::{BASE64_STANDARD, Engine as _};
use envoy_types::pb::google::protobuf::Any;
use prost::{Message, Name};
use prost_reflect::{
    DeserializeOptions, DynamicMessage, MessageDescriptor, ReflectMessage, SerializeOptions,
};
use serde_json::{Value, json};

use crate::TYPE_URL_PREFIX;
use crate::pool::pool;

/// Why a message could not be read from JSON, or printed as JSON.
#[derive(Debug, thiserror::Error)]
pub enum JsonError {
    /// The text does not fit the message.
    #[error("{path}: {message}")]
    Field {
        /// Where in the document, `static_resources.listeners[0].name`.
        path: String,
        /// What is wrong there.
        message: String,
    },
    /// The text is not YAML.
    #[error("not YAML or JSON: {0}")]
    Yaml(String),
    /// A type that `envoy-types` does not know.
    #[error("unknown message type `{0}`")]
    UnknownType(String),
    /// Bytes that are not the message they are said to be.
    #[error("`{type_name}` does not decode")]
    Decode {
        /// Full name of the message.
        type_name: String,
        /// What the decoder said.
        #[source]
        source: prost::DecodeError,
    },
    /// The embedded descriptors are broken.
    #[error("descriptors: {0}")]
    Descriptors(String),
}

/// Reads a message from YAML text (and so from JSON text), refusing unknown fields.
///
/// # Errors
///
/// [`JsonError::Yaml`] for text that is not YAML, else as [`message_from_json`].
pub fn message_from_yaml<M: Message + Name + Default>(text: &str) -> Result<M, JsonError> {
    let value: Value = serde_saphyr::from_str(text).map_err(|e| JsonError::Yaml(e.to_string()))?;
    message_from_json(&value)
}

/// Reads a message from its JSON form, refusing unknown fields.
///
/// # Errors
///
/// [`JsonError::Field`] with the path of the first field that does not fit.
pub fn message_from_json<M: Message + Name + Default>(value: &Value) -> Result<M, JsonError> {
    let descriptor = descriptor(&M::full_name())?;
    let options = DeserializeOptions::new().deny_unknown_fields(true);
    let mut track = serde_path_to_error::Track::new();
    let deserializer = serde_path_to_error::Deserializer::new(value, &mut track);
    let dynamic = DynamicMessage::deserialize_with_options(descriptor, deserializer, &options)
        .map_err(|e| e.to_string())
        .map_err(|message| JsonError::Field { path: track.path().to_string(), message })?;
    M::decode(dynamic.encode_to_vec().as_slice())
        .map_err(|source| JsonError::Decode { type_name: M::full_name(), source })
}

/// Prints a message in its JSON form.
///
/// # Errors
///
/// [`JsonError::UnknownType`] for a message that `envoy-types` does not have.
pub fn message_to_json<M: Message + Name>(message: &M) -> Result<Value, JsonError> {
    print(&M::full_name(), &message.encode_to_vec())
}

/// Prints the message inside an `Any`, with its `@type`. Types we do not know keep their bytes in base64.
///
/// # Errors
///
/// [`JsonError::Decode`] when the bytes are not a message of the said type.
pub fn any_to_json(any: &Any) -> Result<Value, JsonError> {
    let name = any.type_url.rsplit('/').next().unwrap_or_default();
    match print(name, &any.value) {
        Ok(Value::Object(fields)) => {
            let mut typed = serde_json::Map::with_capacity(fields.len() + 1);
            typed.insert("@type".to_owned(), Value::String(format!("{TYPE_URL_PREFIX}{name}")));
            typed.extend(fields);
            Ok(Value::Object(typed))
        }
        Ok(other) => Ok(json!({ "@type": any.type_url, "value": other })),
        Err(JsonError::UnknownType(_)) => {
            Ok(json!({ "@type": any.type_url, "value": BASE64_STANDARD.encode(&any.value) }))
        }
        Err(other) => Err(other),
    }
}

fn print(type_name: &str, bytes: &[u8]) -> Result<Value, JsonError> {
    let decoded = DynamicMessage::decode(descriptor(type_name)?, bytes)
        .map_err(|source| JsonError::Decode { type_name: type_name.to_owned(), source })?;
    let options = SerializeOptions::new().use_proto_field_name(true);
    decoded.serialize_with_options(serde_json::value::Serializer, &options).map_err(|e| JsonError::Field {
        path: decoded.descriptor().full_name().to_owned(),
        message: e.to_string(),
    })
}

fn descriptor(full_name: &str) -> Result<MessageDescriptor, JsonError> {
    pool()
        .map_err(JsonError::Descriptors)?
        .get_message_by_name(full_name)
        .ok_or_else(|| JsonError::UnknownType(full_name.to_owned()))
}

#[cfg(test)]
mod tests {
    use envoy_types::pb::envoy::config::bootstrap::v3::Bootstrap;
    use envoy_types::pb::envoy::config::listener::v3::Listener;

    use super::*;

    const LISTENER: &str = r#"
name: in
address: {socket_address: {address: 127.0.0.1, port_value: 80}}
filter_chains:
- filters:
  - name: hcm
    typed_config:
      "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
      stat_prefix: in
      stream_idle_timeout: 1.5s
      http_filters:
      - name: router
        typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}
"#;

    #[test]
    fn nested_any_survives_a_round_trip() {
        let listener: Listener = message_from_yaml(LISTENER).unwrap();
        assert_eq!(listener.name, "in");
        let printed = message_to_json(&listener).unwrap();
        let hcm = &printed["filter_chains"][0]["filters"][0]["typed_config"];
        assert_eq!(hcm["stream_idle_timeout"], "1.500s");
        assert_eq!(message_from_json::<Listener>(&printed).unwrap(), listener);
    }

    #[test]
    fn an_unknown_field_is_refused_with_its_path() {
        let error =
            message_from_yaml::<Bootstrap>("node: {id: a}\nstatic_resources: {listeners: [{nam: b}]}")
                .unwrap_err();
        let text = error.to_string();
        assert!(text.starts_with("static_resources.listeners[0]") && text.contains("nam"), "{text}");
    }

    #[test]
    fn every_message_of_the_pinned_crate_is_known() {
        // The descriptors were taken from envoy-types 0.7.7; a newer crate needs newer descriptors.
        let lock = include_str!("../../../Cargo.lock");
        assert!(lock.contains("name = \"envoy-types\"\nversion = \"0.7.7\""));
        assert!(pool().unwrap().all_messages().count() > 1500);
    }
}
