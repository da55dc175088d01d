// Starts Swagger UI on the page at /docs.

// validatorUrl is null because Swagger UI would otherwise send the API's description to a validator on another host.
SwaggerUIBundle({ url: "openapi.json", dom_id: "#swagger-ui", deepLinking: true, validatorUrl: null });
