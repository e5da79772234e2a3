//! JSON Schema 2020-12, as far as the document uses it: a check of values, and of schemas themselves.

use serde_json::{Map, Value};

/// What a `$ref` of the document stands for.
pub(crate) fn resolve<'a>(document: &'a Value, mut schema: &'a Value) -> &'a Value {
    while let Some(path) = schema.get("$ref").and_then(Value::as_str) {
        let pointer = path.strip_prefix('#').unwrap_or_else(|| panic!("{path} is not of this document"));
        schema = document.pointer(pointer).unwrap_or_else(|| panic!("{path} leads nowhere"));
    }
    schema
}

/// Every way in which a value is not what its schema says.
pub(crate) fn mistakes(document: &Value, schema: &Value, value: &Value) -> Vec<String> {
    let mut told = Vec::new();
    check(document, schema, value, "", &mut told);
    told
}

fn check(document: &Value, schema: &Value, value: &Value, at: &str, told: &mut Vec<String>) {
    let schema = resolve(document, schema);
    let Some(rules) = schema.as_object() else {
        if schema == &Value::Bool(false) {
            told.push(format!("{at}: nothing is allowed here"));
        }
        return;
    };
    let mut no = |why: String| told.push(format!("{at}: {why}: {value}"));
    if rules.get("type").is_some_and(|kinds| !is_of(kinds, value)) {
        no(format!("is not {}", rules["type"]));
    }
    if rules.get("const").is_some_and(|only| only != value) {
        no("is another constant".to_owned());
    }
    if rules.get("enum").and_then(Value::as_array).is_some_and(|values| !values.contains(value)) {
        no("is not one of the enum".to_owned());
    }
    if let Some(number) = value.as_f64() {
        let bound = |name: &str| rules.get(name).and_then(Value::as_f64);
        if bound("minimum").is_some_and(|least| number < least)
            || bound("maximum").is_some_and(|most| number > most)
        {
            no("is out of range".to_owned());
        }
    }
    for (name, any) in [("anyOf", true), ("oneOf", false)] {
        let Some(several) = rules.get(name).and_then(Value::as_array) else { continue };
        let fits = several.iter().filter(|one| mistakes(document, one, value).is_empty()).count();
        if fits == 0 || (!any && fits > 1) {
            told.push(format!("{at}: fits {fits} of {name}: {value}"));
        }
    }
    if let Some(items) = rules.get("items") {
        for (index, item) in value.as_array().into_iter().flatten().enumerate() {
            check(document, items, item, &format!("{at}/{index}"), told);
        }
    }
    if let Some(fields) = value.as_object() {
        object(document, rules, fields, at, told);
    }
}

fn object(
    document: &Value,
    rules: &Map<String, Value>,
    fields: &Map<String, Value>,
    at: &str,
    told: &mut Vec<String>,
) {
    for name in rules.get("required").and_then(Value::as_array).into_iter().flatten() {
        if !fields.contains_key(name.as_str().unwrap()) {
            told.push(format!("{at}: {name} is missing"));
        }
    }
    let known = rules.get("properties").and_then(Value::as_object);
    for (name, value) in fields {
        let at = format!("{at}/{name}");
        match known.and_then(|known| known.get(name)).or(rules.get("additionalProperties")) {
            Some(schema) => check(document, schema, value, &at, told),
            // Answers say nothing that the document does not know.
            None if known.is_some() => told.push(format!("{at} is not in the document")),
            None => {}
        }
    }
}

fn is_of(kinds: &Value, value: &Value) -> bool {
    let one = |kind: &Value| match kind.as_str().unwrap() {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_i64() || value.is_u64(),
        "number" => value.is_number(),
        "string" => value.is_string(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        other => panic!("`{other}` is no type"),
    };
    kinds.as_array().map_or_else(|| one(kinds), |several| several.iter().any(one))
}

/// Refuses what is no schema: the vocabulary that is used, each word with a value of its form.
pub(crate) fn is_a_schema(document: &Value, schema: &Value, at: &str) {
    let rules = match schema {
        Value::Bool(_) => return,
        Value::Object(rules) => rules,
        other => panic!("{at}: {other} is no schema"),
    };
    for (word, value) in rules {
        let at = format!("{at}/{word}");
        match word.as_str() {
            "$ref" => drop(resolve(document, schema)),
            "type" => drop(is_of(value, &Value::Null)),
            "title" | "description" | "format" | "pattern" => assert!(value.is_string(), "{at}"),
            "minimum" | "maximum" => assert!(value.is_number(), "{at}"),
            "minLength" | "maxLength" | "minItems" | "maxItems" => assert!(value.is_u64(), "{at}"),
            "enum" => assert!(value.as_array().is_some_and(|values| !values.is_empty()), "{at}"),
            "uniqueItems" => assert!(value.is_boolean(), "{at}"),
            "const" | "default" | "examples" => {}
            "required" => {
                let names = value.as_array().unwrap_or_else(|| panic!("{at}"));
                let properties = &rules["properties"];
                names
                    .iter()
                    .for_each(|name| assert!(properties.get(name.as_str().unwrap()).is_some(), "{at}"));
            }
            "items" | "additionalProperties" | "not" => is_a_schema(document, value, &at),
            "anyOf" | "oneOf" | "allOf" | "prefixItems" => {
                value.as_array().unwrap().iter().for_each(|one| is_a_schema(document, one, &at));
            }
            "properties" | "$defs" => {
                value
                    .as_object()
                    .unwrap()
                    .iter()
                    .for_each(|(n, s)| is_a_schema(document, s, &format!("{at}/{n}")));
            }
            other => panic!("{at}: `{other}` is not a word that this test knows"),
        }
    }
}
