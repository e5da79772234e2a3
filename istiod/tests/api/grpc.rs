//! The admin API in gRPC: the same calls, the same roles.

use bytes::{Buf, BufMut, Bytes};
use futures::StreamExt;
use http::uri::PathAndQuery;
use istiod::access::{Permission, Role};
use istiod::api::grpc::{DESCRIPTORS, method, pb};
use istiod::api::routes::{self, Form, Route, Scope};
use prost::Message;
use prost_reflect::{DescriptorPool, DynamicMessage, ReflectMessage, Value};
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use crate::member::{ADMIN, Member};
use crate::roles::rule;

async fn channel(member: &Member) -> Channel {
    let endpoint = Channel::from_shared(format!("http://{}", member.address)).unwrap();
    endpoint.connect().await.unwrap()
}

fn with<T>(token: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
    request
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn configuration_is_written_listed_and_watched() {
    let member = Member::start().await;
    let mut config = pb::config_client::ConfigClient::new(channel(&member).await);
    let file = pb::SourceFile { name: "a.yaml".to_owned(), text: rule("shop", "a") };
    let apply = pb::ApplyRequest { files: vec![file], ..Default::default() };
    let report = config.apply(with(ADMIN, apply)).await.unwrap().into_inner();
    assert_eq!((report.objects[0].name.as_str(), report.objects[0].action.as_str()), ("a", "created"));
    let list = pb::ListObjectsRequest { kind: "all".to_owned(), ..Default::default() };
    let list = config.list(with(ADMIN, list)).await.unwrap().into_inner();
    assert_eq!((list.items.len(), list.metadata.unwrap().resource_version), (1, report.revision.to_string()));
    let get = pb::GetRequest {
        kind: "dr".to_owned(),
        namespace: "shop".to_owned(),
        name: "a".to_owned(),
        consistency: None,
    };
    let object = config.get(with(ADMIN, get.clone())).await.unwrap().into_inner().object;
    let watch =
        pb::WatchRequest { kind: "all".to_owned(), revision: Some(report.revision), ..Default::default() };
    let mut events = config.watch(with(ADMIN, watch)).await.unwrap().into_inner();
    let replace = pb::ReplaceRequest {
        kind: "dr".to_owned(),
        namespace: "shop".to_owned(),
        name: "a".to_owned(),
        object: object.clone().map(|mut object| {
            let host = prost_types::value::Kind::StringValue("b".to_owned());
            let spec = prost_types::Struct { fields: [("host".to_owned(), host.into())].into() };
            object.fields.insert("spec".to_owned(), prost_types::value::Kind::StructValue(spec).into());
            object
        }),
        expected_revision: Some(report.revision),
        ..Default::default()
    };
    let replaced = config.replace(with(ADMIN, replace.clone())).await.unwrap().into_inner();
    let event = loop {
        let event = events.next().await.unwrap().unwrap();
        if event.r#type != "BOOKMARK" {
            break event;
        }
    };
    assert_eq!((event.r#type.as_str(), event.revision), ("MODIFIED", replaced.revision));
    let conflict = config.replace(with(ADMIN, replace)).await;
    // The same value again is no change, so nothing conflicts.
    assert_eq!(conflict.unwrap().into_inner().objects[0].action, "unchanged");
    let delete = pb::DeleteRequest {
        kind: "dr".to_owned(),
        namespace: "shop".to_owned(),
        name: "a".to_owned(),
        expected_revision: Some(report.revision),
        ..Default::default()
    };
    assert_eq!(config.delete(with(ADMIN, delete)).await.unwrap_err().code(), Code::Aborted);
    drop(events);
    member.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refusal_carries_its_problem() {
    let member = Member::start().await;
    let mut config = pb::config_client::ConfigClient::new(channel(&member).await);
    let file = pb::SourceFile { name: "a.yaml".to_owned(), text: "kind: Nonsense".to_owned() };
    let apply = pb::ApplyRequest { files: vec![file], ..Default::default() };
    let refused = config.apply(with(ADMIN, apply)).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    let details = pb::Refusal::decode(refused.details()).unwrap();
    assert_eq!((details.code, details.message.as_str()), (3, refused.message()));
    let problem = pb::Problem::decode(details.details[0].value.as_slice()).unwrap();
    assert_eq!((problem.status, problem.errors[0].file.as_str()), (422, "a.yaml"));
    assert!(problem.errors[0].line.is_some());
    let mut mesh = pb::mesh_client::MeshClient::new(channel(&member).await);
    assert_eq!(mesh.get_version(with("guess", ())).await.unwrap_err().code(), Code::Unauthenticated);
    let me = pb::access_client::AccessClient::new(channel(&member).await).who_am_i(with(ADMIN, ())).await;
    assert_eq!(me.unwrap().into_inner().role, "admin");
    member.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn health_is_open_and_reflection_is_for_those_who_may_read() {
    let member = Member::start().await;
    let channel = channel(&member).await;
    let check = tonic_health::pb::HealthCheckRequest::default();
    let health = tonic_health::pb::health_client::HealthClient::new(channel.clone()).check(check).await;
    assert_eq!(health.unwrap().into_inner().status, 1);
    use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
    use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
    use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
    let ask = || {
        let message_request = Some(MessageRequest::ListServices(String::new()));
        let request =
            tonic_reflection::pb::v1::ServerReflectionRequest { host: String::new(), message_request };
        futures::stream::iter([request])
    };
    let mut reflection = ServerReflectionClient::new(channel);
    let refused = reflection.server_reflection_info(ask()).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated, "{refused:?}");
    let mut answers = reflection.server_reflection_info(with(ADMIN, ask())).await.unwrap().into_inner();
    let Some(MessageResponse::ListServicesResponse(list)) =
        answers.next().await.unwrap().unwrap().message_response
    else {
        panic!("no list of services")
    };
    assert!(list.service.iter().any(|service| service.name == "istiod.admin.v1.Config"), "{list:?}");
    drop(answers);
    member.stop().await;
}

/// Encoded messages, of whatever type.
#[derive(Clone, Copy, Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        to.put(item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(from.copy_to_bytes(from.remaining())))
    }
}

/// A request with every parameter of the path.
fn message(route: &Route, input: prost_reflect::MessageDescriptor, namespace: &str) -> Bytes {
    let mut message = DynamicMessage::new(input);
    for name in route.path.split('/').filter_map(|segment| segment.strip_prefix('{')?.strip_suffix('}')) {
        let text = match name {
            "kind" => "virtualservices",
            "namespace" => namespace,
            "revision" => continue,
            _ => "absent",
        };
        message.set_field_by_name(name, Value::String(text.to_owned()));
    }
    if route.id == "wait" {
        message.set_field_by_name("timeout_milliseconds", Value::U64(1));
    }
    if let Some(object) = message.descriptor().get_field_by_name("object") {
        message.set_field(&object, Value::default_value_for_field(&object));
    }
    message.encode_to_vec().into()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_method_asks_every_caller_for_its_role() {
    let member = Member::start().await;
    let pool = DescriptorPool::decode(DESCRIPTORS).unwrap();
    let mut callers = vec![(None, false, "guess".to_owned()), (Some(Role::Admin), false, ADMIN.to_owned())];
    for role in Role::ALL {
        callers.push((Some(role), false, member.token(role, &[]).await.token));
        callers.push((Some(role), true, member.token(role, &["shop"]).await.token));
    }
    let channel = channel(&member).await;
    let mut calls = 0;
    for route in routes::all().filter(|route| route.rpc.is_some() || matches!(route.answer, Form::Grpc)) {
        // Reflection and health are services of their own.
        let path = route.rpc.map_or(route.path.to_owned(), |rpc| format!("/istiod.admin.v1.{rpc}"));
        let path: PathAndQuery = path.parse().unwrap();
        let input = route.rpc.map(|rpc| method(&pool, rpc).unwrap().input());
        let streams = matches!(route.answer, Form::Lines(_) | Form::Bytes | Form::Grpc);
        for (role, limited, token) in &callers {
            for namespace in ["shop", "bank"] {
                let mut client = tonic::client::Grpc::new(channel.clone());
                client.ready().await.unwrap();
                let bytes = input.clone().map(|input| message(route, input, namespace));
                let request = with(token, bytes.unwrap_or_default());
                let answer = if streams {
                    client.server_streaming(request, path.clone(), Raw).await.map(drop)
                } else {
                    client.unary(request, path.clone(), Raw).await.map(drop)
                };
                let code = answer.as_ref().map_or_else(Status::code, |()| Code::Ok);
                let told = format!("{path} by {role:?}, limited {limited}, in {namespace}: {answer:?}");
                match refused(route, *role, *limited, namespace) {
                    Some(wanted) => assert_eq!(code, wanted, "{told}"),
                    None => {
                        let passed =
                            ![Code::Unauthenticated, Code::Internal, Code::Unimplemented].contains(&code);
                        // The service layer has its own say about what is in the message.
                        assert!(
                            passed && (code != Code::PermissionDenied || route.scope == Scope::Each),
                            "{told}"
                        );
                    }
                }
                calls += 1;
            }
        }
    }
    assert!(calls > 300, "{calls}");
    let mut client = tonic::client::Grpc::new(channel);
    client.ready().await.unwrap();
    let nowhere = PathAndQuery::from_static("/istiod.admin.v1.Config/Nonsense");
    let answer = client.unary(with(ADMIN, Bytes::new()), nowhere, Raw).await;
    assert_eq!(answer.unwrap_err().code(), Code::Unimplemented);
    member.stop().await;
}

/// What the gate says; nothing when it lets the call through.
fn refused(route: &Route, role: Option<Role>, limited: bool, namespace: &str) -> Option<Code> {
    let Some(role) = role else {
        return (route.needs != Permission::Open).then_some(Code::Unauthenticated);
    };
    let enough = match route.needs {
        Permission::Open | Permission::Read => true,
        Permission::Write => role != Role::Viewer,
        Permission::Administer => role == Role::Admin,
    };
    let covered = match route.scope {
        Scope::Nobody | Scope::Each => true,
        Scope::Path => !limited || namespace == "shop",
        Scope::Mesh => !limited,
    };
    (!enough || !covered).then_some(Code::PermissionDenied)
}
