// validatorUrl null: Swagger UI would otherwise send the description to a validator on another host.
SwaggerUIBundle({ url: "openapi.json", dom_id: "#swagger-ui", deepLinking: true, validatorUrl: null });
